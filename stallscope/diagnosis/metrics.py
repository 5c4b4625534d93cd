"""What requests wait for, as a client feels it: names, and the codes that stand for them in tables."""

METRICS = ("ttft", "itl", "delivery")  # first token, inter-token gap, from the last token to the client
TTFT, ITL, DELIVERY = 0, 1, 2
IN_WORDS = ("TTFT", "longest gap", "delivery")
END_TO_END = "e2e"  # from arrival to the last token: shown, but nothing that is charged, since it is mostly own work

"""What other engines write instead of OTLP, as the spans of ours that say the same.

One module a producer: ``dynamo``, ``tensorrt_llm`` (their JSON records), ``jaeger`` (its JSON documents), ``sglang``
(OTLP spans with names of its own). ``registry`` knows which record is whose; ``records`` is what they have in common.
Behind them everything reads on as if it had come as OTLP.
"""

"""Spans that come over the network, onto disk and to whoever watches them live.

Flow: a request (``over_http``, ``over_grpc``) → its body, checked and counted (``bodies``) → ``intake``: room, retries,
one commit for all that wait → ``store``: the open segment and its fsync, ``closed`` segments compressed and kept to a
budget, both files as ``segments`` lays them out → the sender's acknowledgement, and ``Listener``s. ``collector`` is the
process around it; ``refusals`` are what senders are told.

Whatever watches spans live is a ``Listener``: it hears of each group of batches once they are durable.
"""

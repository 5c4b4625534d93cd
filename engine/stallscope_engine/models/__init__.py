"""The networks that the torch executor runs.

``configs`` describes them (without torch), ``weights`` reads or draws their parameters, ``linear`` multiplies by them,
``kv_cache`` holds keys and values in blocks and attends to them, ``llama`` is the network.
"""

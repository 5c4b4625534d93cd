"""The networks that the executors run, and the tokenizers that stand between them and text.

``configs`` describes networks (without torch), ``weights`` reads or draws their parameters, ``rotary`` says how their
positions turn. On the CPU, ``linear`` multiplies by the parameters, ``kv_cache`` holds keys and values in blocks and
attends to them, and ``decoder`` is the network. ``tokenizer`` turns text and, by ``chat_template``, conversations into
token ids and back.
"""

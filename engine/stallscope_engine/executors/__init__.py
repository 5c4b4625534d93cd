"""What turns a batch into outputs or a duration: torch on a CPU (``torch_cpu``) or a GPU (``torch_cuda``), or virtual
time (``virtual``). ``choice`` finds the one for a machine.

Of the GPU's, ``lines`` and ``step_buffer`` bring a step's inputs there, ``decode_graphs`` launches decodes,
``sampling`` picks tokens, and ``memory`` reckons what fits.
"""

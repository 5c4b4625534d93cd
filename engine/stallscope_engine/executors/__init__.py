"""What turns a batch into outputs or a duration: torch on a CPU (``torch_cpu``), or virtual time (``virtual``)."""

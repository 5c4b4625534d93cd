"""What the executor for a GPU is made of: the packed step, lines of requests, sampling, graphs, memory."""

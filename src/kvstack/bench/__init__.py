"""Speed of the kernels on a GPU, beside those of other libraries, all in one process and on the same terms."""

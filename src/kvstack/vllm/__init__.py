"""The plugin for vLLM: K and V of full-attention layers as pages of codes, read by our kernels; nothing else of vLLM changes.

vLLM finds `plugin.register` by its entry point in every process. `settings` says what is asked for, `choice` which layers get it,
`backend` how large a page is, `steps` and `impl` what a forward does with it. There is no mathematics here, and no other copy of keys
and values. Importing this package does not import vLLM.
"""

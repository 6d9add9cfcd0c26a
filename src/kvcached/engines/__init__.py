"""Engines: the only modules that import vLLM, SGLang or transformers."""

"""Speculative decoding against plain decoding, one prompt at a time: second part of benchmarks/generation.py."""

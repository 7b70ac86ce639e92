"""GGUF models on the CPU (and Metal) through llama.cpp's C interface.

`driver.py` answers questions about files and devices and imports nothing heavy; `engine.py` is
loaded in the worker that hosts the model.
"""

"""Drivers: code that opens engines. Imports kernel.device and kernel.errors, nothing else of ours."""

"""Bundled plugins, found by entry point like any third party's."""

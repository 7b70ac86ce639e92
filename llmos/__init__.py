"""The face: command line, boot, configuration, model store, plugins and the public API."""

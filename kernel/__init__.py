"""The kernel: mechanism and policy. Imports the standard library only."""

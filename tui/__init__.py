"""The full-screen monitor, fed by snapshots only."""

"""The commands: train, evaluate, prepare, report, quickstart."""

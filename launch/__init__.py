"""The commands: train, evaluate, prepare, report, quickstart."""

STOPPED = 75  # EX_TEMPFAIL: what a run returns, told so by STOPPED_EXIT_CODE, that was stopped before its last step

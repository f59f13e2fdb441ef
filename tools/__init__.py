"""Programs around a training run, one for each verb: `python -m tools.VERB --help`."""

"""ctrlrl: train language models whose safety and helpfulness an operator can dial."""

__version__ = "0.1.0"

"""What a token table starts from: the levels of an HTT table, and the statistics of the training text."""

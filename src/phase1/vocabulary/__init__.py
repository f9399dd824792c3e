"""What an HTT table starts from: its levels, and the statistics of the training text."""

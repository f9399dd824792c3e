"""Whether a model may be measured at all: it moves, sees no future, its loss is in nats, it learns, and forgets its callers."""

"""NumPy twins: what a card makes once more, written from the formula and nothing else, as plainly as can be."""

"""One algorithm, or one family, in each file: the mathematics, the public class, the card."""

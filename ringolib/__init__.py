"""The parts that Ringo Exp is made of."""

__version__ = "0.1.0"

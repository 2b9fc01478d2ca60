"""fastssl: pretrain a vision backbone on unlabelled images, then test, use and export what it learned."""

__version__ = "0.1.0"

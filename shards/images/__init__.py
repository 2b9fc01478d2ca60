"""Prove that one image or mask decodes, and bring it into the form in which it is stored."""

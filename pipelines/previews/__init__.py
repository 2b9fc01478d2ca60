"""Look before you train: contact sheets of views and operations, and how far engines are from the reference."""

"""What happens to an image: recipes, and the random numbers that each sample draws from them."""

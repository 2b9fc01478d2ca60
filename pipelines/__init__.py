"""Shards to augmented views: recipes, draws and the engines that apply them."""

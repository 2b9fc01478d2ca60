"""What applies the draws: the engines fused, dali, kornia and reference."""

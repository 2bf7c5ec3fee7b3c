"""PyTorch and Hugging Face call the operators and modules of this distribution."""

"""Models in and out of Hugging Face folders, each with a receipt that both sides compute the same."""

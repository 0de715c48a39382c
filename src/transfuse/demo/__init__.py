"""The demonstration: tiny ViTs trained on real digits, and a fine-tune carried to three kinds of new release."""

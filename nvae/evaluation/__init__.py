"""What a trained model is worth: bounds, sample quality, results beside published figures, the report page."""

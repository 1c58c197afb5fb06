"""What the scripts call: arguments parsed, objects built, actions called."""

"""What trained weights look like from the rules' point of view."""

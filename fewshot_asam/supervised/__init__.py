"""Image classification with many labelled images of each class, where the paper's Tables 1 to 5, 8 and 9 stand."""

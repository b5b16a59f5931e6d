"""What a trained network looks like from each class: gradient norms, sharpness, curvature, slices of the loss."""

"""Knowledge Vector Attribution: integrated gradients of every row, in one pass upwards."""

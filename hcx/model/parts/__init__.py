"""What an engine may replace in the decoder: linears, embedding, output, norm, attention; and the weight sources."""

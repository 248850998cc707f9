"""What concerns machines: `hcx doctor`."""

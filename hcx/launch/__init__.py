"""What concerns machines: `hcx doctor`, `hcx plan`, rehearsals of `hcx train --rehearse`."""

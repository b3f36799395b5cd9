"""Images, their order, their place on the device."""

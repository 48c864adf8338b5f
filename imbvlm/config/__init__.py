"""What one trial is: sections, registries, and facts about an encoder."""

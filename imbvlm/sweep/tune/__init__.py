"""Jobs under Ray Tune."""

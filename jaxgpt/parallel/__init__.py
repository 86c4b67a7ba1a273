"""Where does it run? The device mesh and the table that says which axis of an array lies on which devices."""

"""What people and programs read: tables, exports, trackers. Reads finished artifacts, computes no score."""

//! What becomes of a captured connect, from Services and Pods to the plan.

mod choice;
mod destinations;
mod services;
mod waypoints;
mod world;

//! Who may shake hands now.
//!
//! A handshake costs memory and comes before anybody has proved anything, so a worker has a bounded number of places for
//! them. Normally a place is given back within milliseconds, and who finds none waits. Where places are stuck, each
//! address may have its share of them, and who has less takes the place of the oldest: a crowd that connects and says
//! nothing keeps nobody out.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// TLS handshakes under way in one worker; more wait in the listeners' backlogs.
pub const MAX_HANDSHAKES: usize = 256;
/// Of them with one address, so that one peer cannot take every place. A client's proxy makes one at a time for each of
/// its destinations.
pub const MAX_HANDSHAKES_PER_SOURCE: usize = 64;
/// A handshake that takes longer is stuck: this is two round trips around the world, or the CPU time of a whole worker full
/// of handshakes.
const STUCK_AFTER: Duration = Duration::from_millis(500);

/// The places of one worker.
#[derive(Debug, Default)]
pub struct Handshakes {
    places: Mutex<Places>,
    /// Told of each place that is given back.
    freed: Notify,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    all: Arc<Handshakes>,
    id: u64,
    lost: Arc<Notify>,
}

impl Handshakes {
    /// Waits for a place; `None` for an address that has too many.
    pub async fn enter(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let source = source.to_canonical();
        let mut was_woken = false;
        loop {
            let admission = self.places().admit(source, Instant::now());
            match admission {
                Admission::Go(id, lost) => return Some(Place { all: Arc::clone(self), id, lost }),
                Admission::Refuse => {
                    // The place is still free: the next one that waits for it must hear of it.
                    if was_woken {
                        self.freed.notify_one();
                    }
                    return None;
                }
                Admission::Wait(until) => {
                    was_woken = tokio::select! {
                        () = self.freed.notified() => true,
                        () = sleep_until(until) => false,
                    }
                }
            }
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until somebody else has got this place.
    pub async fn lost(&self) {
        self.lost.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.places().leave(self.id);
        self.all.freed.notify_one();
    }
}

/// What is said to who wants a place.
#[derive(Debug)]
enum Admission {
    /// It has this one, until it is told that it has lost it.
    Go(u64, Arc<Notify>),
    /// There is none. Ask again when one is given back, or at this time.
    Wait(Instant),
    /// It has its share.
    Refuse,
}

#[derive(Debug, Default)]
struct Places {
    next_id: u64,
    /// In the order in which they were taken.
    taken: BTreeMap<u64, Taken>,
    by_source: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Taken {
    source: IpAddr,
    since: Instant,
    lost: Arc<Notify>,
}

impl Places {
    fn admit(&mut self, source: IpAddr, now: Instant) -> Admission {
        let has = self.by_source.get(&source).copied().unwrap_or_default();
        if has >= MAX_HANDSHAKES_PER_SOURCE {
            return Admission::Refuse;
        }
        if self.taken.len() >= MAX_HANDSHAKES
            && let Some((oldest, taken)) = self.taken.first_key_value()
        {
            let stuck_at = taken.since + STUCK_AFTER;
            if now < stuck_at {
                return Admission::Wait(stuck_at);
            }
            let sources = self.by_source.len() + usize::from(has == 0);
            if has > 0 && has >= MAX_HANDSHAKES / sources {
                return Admission::Refuse;
            }
            let (oldest, lost) = (*oldest, Arc::clone(&taken.lost));
            self.leave(oldest);
            lost.notify_one();
        }
        let (id, lost) = (self.next_id, Arc::new(Notify::new()));
        self.next_id += 1;
        self.taken.insert(id, Taken { source, since: now, lost: Arc::clone(&lost) });
        *self.by_source.entry(source).or_default() += 1;
        Admission::Go(id, lost)
    }

    /// Gives a place back; one that was lost before is somebody else's.
    fn leave(&mut self, id: u64) {
        let Some(taken) = self.taken.remove(&id) else { return };
        if let Some(has) = self.by_source.get_mut(&taken.source) {
            *has -= 1;
            if *has == 0 {
                self.by_source.remove(&taken.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn source(number: u16) -> IpAddr {
        let [high, low] = number.to_be_bytes();
        Ipv4Addr::new(10, 0, high, low).into()
    }

    fn taken_by(places: &mut Places, source: IpAddr, now: Instant) -> u64 {
        match places.admit(source, now) {
            Admission::Go(id, _) => id,
            other => panic!("{other:?}"),
        }
    }

    /// All places taken, an equal share by each of so many addresses.
    fn crowd(sources: u16, now: Instant) -> (Places, Vec<u64>) {
        let mut places = Places::default();
        let ids = (0..MAX_HANDSHAKES).map(|number| {
            let number = u16::try_from(number).unwrap();
            taken_by(&mut places, source(number % sources), now)
        });
        let ids = ids.collect();
        (places, ids)
    }

    #[test]
    fn one_address_has_some_of_the_places() {
        let (mut places, now) = (Places::default(), Instant::now());
        for _ in 0..MAX_HANDSHAKES_PER_SOURCE {
            taken_by(&mut places, source(1), now);
        }
        assert!(matches!(places.admit(source(1), now), Admission::Refuse));
        taken_by(&mut places, source(2), now);
    }

    #[test]
    fn who_finds_no_place_waits_until_the_oldest_is_stuck() {
        let now = Instant::now();
        let (mut places, ids) = crowd(8, now);
        let stuck = now + STUCK_AFTER;
        for newcomer in [3, 100] {
            let admission = places.admit(source(newcomer), stuck - Duration::from_millis(1));
            assert!(matches!(admission, Admission::Wait(until) if until == stuck), "{admission:?}");
        }
        places.leave(ids[7]);
        taken_by(&mut places, source(3), now);
        assert_eq!(places.taken.len(), MAX_HANDSHAKES);
    }

    #[tokio::test]
    async fn where_places_are_stuck_who_has_less_than_a_share_gets_the_oldest() {
        let now = Instant::now();
        let (mut places, ids) = crowd(8, now);
        let stuck = now + STUCK_AFTER;
        let oldest = Arc::clone(&places.taken[&ids[0]].lost);
        for number in 0..8 {
            assert!(matches!(places.admit(source(number), stuck), Admission::Refuse), "{number} has its share");
        }
        let newcomer = taken_by(&mut places, source(100), stuck);
        oldest.notified().await;
        assert!(!places.taken.contains_key(&ids[0]) && places.taken.len() == MAX_HANDSHAKES);
        // Who lost a place does not give back that of the newcomer.
        places.leave(ids[0]);
        assert!(places.taken.contains_key(&newcomer) && places.by_source[&source(0)] == MAX_HANDSHAKES / 8 - 1);
    }

    #[test]
    fn more_addresses_than_places_turn_them_over() {
        let now = Instant::now();
        let (mut places, _) = crowd(256, now);
        let stuck = now + STUCK_AFTER;
        assert!(matches!(places.admit(source(0), stuck), Admission::Refuse));
        for number in 256..400 {
            taken_by(&mut places, source(number), stuck);
        }
        assert_eq!((places.taken.len(), places.by_source.len()), (MAX_HANDSHAKES, MAX_HANDSHAKES));
        (0..places.next_id).for_each(|id| places.leave(id));
        assert!(places.taken.is_empty() && places.by_source.is_empty());
    }

    #[tokio::test]
    async fn who_waits_is_told_of_a_place_that_is_given_back() {
        let all = Arc::new(Handshakes::default());
        let mut places = Vec::new();
        for number in 0..MAX_HANDSHAKES {
            places.push(all.enter(source(u16::try_from(number).unwrap())).await.unwrap());
        }
        let waiting = tokio::spawn({
            let all = Arc::clone(&all);
            async move { all.enter(source(1000)).await.is_some() }
        });
        tokio::task::yield_now().await;
        drop(places.pop());
        assert!(tokio::time::timeout(STUCK_AFTER / 2, waiting).await.expect("at once").unwrap());
    }

    /// While it waited its source has got its share by others.
    #[tokio::test]
    async fn who_is_refused_after_waiting_passes_on_that_a_place_is_free() {
        let all = Arc::new(Handshakes::default());
        let mut places = Vec::new();
        for number in 0..MAX_HANDSHAKES {
            let of = if number < MAX_HANDSHAKES_PER_SOURCE - 1 { 1000 } else { u16::try_from(number).unwrap() };
            places.push(all.enter(source(of)).await.unwrap());
        }
        let wait = |number| {
            let all = Arc::clone(&all);
            tokio::spawn(async move { all.enter(source(number)).await })
        };
        let (first, second, third) = (wait(1000), wait(1000), wait(2000));
        tokio::task::yield_now().await;
        // Two places, of which the first source takes one.
        places.truncate(MAX_HANDSHAKES - 2);
        let started = Instant::now();
        let first = first.await.unwrap().expect("the last one of its share");
        assert!(second.await.unwrap().is_none(), "its share is taken");
        let third = third.await.unwrap().expect("the other place");
        assert!(started.elapsed() < STUCK_AFTER / 2, "{:?}", started.elapsed());
        drop((first, third));
    }
}

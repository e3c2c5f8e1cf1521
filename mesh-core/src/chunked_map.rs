//! A sorted map whose copies share what they have in common.
//!
//! A snapshot is replaced as a whole, and one change among 100,000 workloads must not copy 100,000 entries. The entries
//! lie sorted in chunks of at most [`CHUNK_MAX`]; copying the map copies one pointer per chunk, changing an entry copies
//! its chunk, and a map that nobody else holds is changed in place. Iteration is in key order, which makes equal maps
//! give equal bytes. Not here: hashing (its order would be a source of chance).

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// Entries per chunk. 100,000 entries make about 600 chunks: a copy and a change both touch less than 1,000 pointers.
pub const CHUNK_MAX: usize = 256;

/// Neighbours that together hold no more than this are joined, so that removals leave no crumbs.
const CHUNK_JOIN: usize = CHUNK_MAX / 2;

/// A sorted map with cheap copies.
pub struct ChunkedMap<K, V> {
    /// Sorted; none is empty.
    chunks: Vec<Arc<Vec<(K, V)>>>,
    len: usize,
}

impl<K: Ord + Clone, V: Clone> ChunkedMap<K, V> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.matching(|k| k.borrow().cmp(key)).next().map(|(_, v)| v)
    }

    /// All entries in key order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|c| c.iter()).map(|(k, v)| (k, v))
    }

    /// Entries for which `order` says `Equal`, in key order. `order` tells where a key lies relative to what is looked
    /// for and must agree with the order of keys.
    pub fn matching<'a, F: Fn(&K) -> Ordering>(
        &'a self,
        order: F,
    ) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V, F> {
        let first = self.chunks.partition_point(|c| c.last().is_some_and(|(k, _)| order(k) == Ordering::Less));
        let skip = self.chunks.get(first).map_or(0, |c| c.partition_point(|(k, _)| order(k) == Ordering::Less));
        self.chunks[first..]
            .iter()
            .flat_map(|c| c.iter())
            .skip(skip)
            .map(|(k, v)| (k, v))
            .take_while(move |(k, _)| order(k) == Ordering::Equal)
    }

    /// Sets a value and returns the one that was there.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if self.chunks.is_empty() {
            self.chunks.push(Arc::new(vec![(key, value)]));
            self.len = 1;
            return None;
        }
        let index = self.chunk_of(&key);
        let chunk = Arc::make_mut(&mut self.chunks[index]);
        match chunk.binary_search_by(|(k, _)| k.cmp(&key)) {
            Ok(at) => Some(std::mem::replace(&mut chunk[at].1, value)),
            Err(at) => {
                chunk.insert(at, (key, value));
                self.len += 1;
                if chunk.len() > CHUNK_MAX {
                    // Sorted input is the common bulk load: it leaves full chunks behind when only the end is split off.
                    let cut = if at + 1 == chunk.len() { CHUNK_MAX } else { chunk.len() / 2 };
                    let upper = chunk.split_off(cut);
                    self.chunks.insert(index + 1, Arc::new(upper));
                }
                None
            }
        }
    }

    /// Takes an entry out.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        if self.chunks.is_empty() {
            return None;
        }
        let index = self.chunk_of(key);
        let at = self.chunks[index].binary_search_by(|(k, _)| k.borrow().cmp(key)).ok()?;
        let (_, value) = Arc::make_mut(&mut self.chunks[index]).remove(at);
        self.len -= 1;
        self.join(index);
        Some(value)
    }

    /// Index of the chunk that holds the key or that it belongs into.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        self.chunks.partition_point(|c| c.first().is_some_and(|(k, _)| k.borrow() <= key)).saturating_sub(1)
    }

    fn join(&mut self, index: usize) {
        if self.chunks[index].is_empty() {
            self.chunks.remove(index);
        } else if index + 1 < self.chunks.len() && self.chunks[index].len() + self.chunks[index + 1].len() <= CHUNK_JOIN
        {
            let upper = self.chunks.remove(index + 1);
            Arc::make_mut(&mut self.chunks[index]).extend(upper.iter().cloned());
        }
    }
}

impl<K, V> Default for ChunkedMap<K, V> {
    fn default() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }
}

impl<K, V> Clone for ChunkedMap<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), len: self.len }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for ChunkedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.chunks.iter().flat_map(|c| c.iter()).map(|(k, v)| (k, v))).finish()
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for ChunkedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        // Where the chunks are cut depends on history and is not part of the value.
        self.len == other.len
            && self.chunks.iter().flat_map(|c| c.iter()).eq(other.chunks.iter().flat_map(|c| c.iter()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_btree_map(ops in prop::collection::vec((any::<bool>(), 0u16..2_000, any::<u8>()), 0..4_000)) {
            let mut map = ChunkedMap::default();
            let mut model = BTreeMap::new();
            for (insert, key, value) in ops {
                if insert {
                    prop_assert_eq!(map.insert(key, value), model.insert(key, value));
                } else {
                    prop_assert_eq!(map.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(map.len(), model.len());
            }
            prop_assert!(map.iter().eq(model.iter()));
            for key in 0..2_000u16 {
                prop_assert_eq!(map.get(&key), model.get(&key));
            }
            let tens: Vec<_> = map.matching(|k| (k / 10).cmp(&7)).collect();
            prop_assert!(tens.into_iter().eq(model.range(70..80)));
        }
    }

    #[test]
    fn a_copy_is_not_changed_and_shares_all_other_chunks() {
        let mut map = ChunkedMap::default();
        for key in 0..100_000u32 {
            map.insert(key, key);
        }
        let before = map.clone();
        map.insert(50_000, 1);
        assert_eq!(before.get(&50_000), Some(&50_000));
        assert_eq!(map.get(&50_000), Some(&1));
        let copied = map.chunks.iter().zip(&before.chunks).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!(copied, 1);
        assert!(map.chunks.len() < 1_000, "{} chunks", map.chunks.len());
    }

    #[test]
    fn removals_leave_no_crumbs() {
        let mut map: ChunkedMap<u32, ()> = ChunkedMap::default();
        for key in 0..10_000 {
            map.insert(key, ());
        }
        for key in (0..10_000).filter(|k| k % 100 != 0).rev() {
            map.remove(&key);
        }
        assert_eq!(map.len(), 100);
        assert!(map.chunks.len() <= 5, "{} chunks", map.chunks.len());
    }
}

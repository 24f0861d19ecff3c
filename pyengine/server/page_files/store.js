// Conversations and their pictures, kept in this browser (IndexedDB).

const NAME = "pyengine", VERSION = 1;
let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, VERSION);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("conversations", { keyPath: "id" });
      asked.result.createObjectStore("media", { keyPath: "id" });
    };
    asked.onsuccess = () => {
      asked.result.onversionchange = () => asked.result.close();        // another tab empties or renews it
      resolve(asked.result);
    };
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

async function run(store, mode, what) {
  const transaction = (await open()).transaction(store, mode);
  const asked = what(transaction.objectStore(store));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export const listConversations = async () =>
  (await run("conversations", "readonly", (s) => s.getAll())).sort((a, b) => b.updated - a.updated);
export const saveConversation = (conversation) => run("conversations", "readwrite", (s) => s.put(conversation));
export const getMedium = (id) => run("media", "readonly", (s) => s.get(id));
export const saveMedium = (medium) => run("media", "readwrite", (s) => s.put(medium));

export async function deleteConversation(conversation) {
  await run("conversations", "readwrite", (s) => s.delete(conversation.id));
  const media = Object.values(conversation.nodes).flatMap((node) => node.media || []);
  await run("media", "readwrite", (s) => { for (const m of media) s.delete(m.id); });
}

// What was set for new conversations; not large, so not in the database.
export function remembered(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`pyengine.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`pyengine.${name}`, JSON.stringify(value));
  } catch { /* storage is full or closed: it is asked for again next time */ }
}

// Types of the page's data, for `npm run check`.

/** A text, or an image or a video by the hash of its file. */
export interface Part {
  type: "text" | "image" | "video";
  text?: string;
  key?: string;
  name?: string;
  label?: string; // name of a view
  frames?: number; // of a video
  start?: number;
  end?: number;
  times?: number[]; // of the frames that the model gets
}

/** A message. `changed` decides between two tabs' versions. An answer without `finish` was broken off. */
export interface Message {
  id: string;
  parent: string | null;
  role: "user" | "assistant";
  parts: Part[];
  made: number;
  changed: number;
  finish?: string;
  error?: string;
  stopped?: boolean;
  model?: string;
  usage?: any;
  timings?: any;
  attribution?: any;
  citations?: any[]; // annotations of the sentences
}

export interface Settings {
  system?: string;
  temperature?: number;
  max_tokens?: number;
  seed?: number;
  cite?: boolean;
}

/** A tree of messages; `leaf` selects the branch that is shown. */
export interface Chat {
  id: string;
  title: string;
  changed: number;
  nodes: Record<string, Message>;
  leaf: string | null;
  pinned?: boolean;
  model?: string;
  settings?: Settings;
}

/** A part of the message being written, with what the page knows about its file. */
export interface Attachment extends Part {
  id: string;
  key: string;
  type: "image" | "video";
  name: string;
  time: number; // of the file, ms
  bytes: number;
}

/** The message being written in a chat. `stash`: the one that was put aside for editing. */
export interface Draft {
  id: string;
  text: string;
  attachments: Attachment[];
  editing: string | null;
  stash?: { text: string; attachments: Attachment[] };
  changed: number;
}
